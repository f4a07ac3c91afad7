"""The warnings of a plan at the gVisor tier: for what an image holds, for what a policy asks, and for nothing else."""

import msgspec
import pytest
from plan_inputs import BASE, ROOT_V1, ROOT_V1_GVISOR, policy

from ringfence.plan.gvisor_compat import PROGRAMS, warnings
from ringfence.plan.make import make_plan

ASKED = policy(isolation="gvisor")


def test_nothing_is_said_of_an_ordinary_image() -> None:
    """Words that come each time are not read: the defaults have none."""
    assert warnings(ASKED, BASE) == []
    assert make_plan(ASKED, BASE, ROOT_V1_GVISOR)["warnings"] == []


@pytest.mark.parametrize(("path", "what", "why"), PROGRAMS)
def test_a_program_that_will_not_work(path: str, what: str, why: str) -> None:
    """One sentence with what it is and why, at the tier that it is true of and at no other."""
    image = msgspec.structs.replace(BASE, noticed=frozenset({path}))
    expected = [f"the image has {what}: {why}"]
    assert make_plan(ASKED, image, ROOT_V1_GVISOR)["warnings"] == expected
    assert make_plan(policy(isolation="linux"), image, ROOT_V1)["warnings"] == []


def test_a_capability_without_effect() -> None:
    """It is granted, for programs that insist, and said to do nothing; others are not spoken of."""
    asked = policy(isolation="gvisor", user="0:0", capabilities=["CAP_SYS_TIME", "CAP_CHOWN"])
    accepted = frozenset({"limits.disk", "limits.inodes"})
    plan = make_plan(asked, BASE, ROOT_V1_GVISOR, allow_unenforced=accepted)
    assert plan["warnings"] == ["CAP_SYS_TIME has no effect in gVisor: the clock cannot be set"]
    assert plan["guest"] is not None
    assert "CAP_SYS_TIME" in plan["guest"]["oci"]["process"]["capabilities"]["permitted"]


def test_new_privileges_and_profiles_of_ones_own() -> None:
    """What the sentry has another meaning for is said; the presets of ours need no word."""
    (said,) = warnings(policy(isolation="gvisor", no_new_privileges=False), BASE)
    assert said.startswith("no_new_privileges: false has no effect")
    (said,) = warnings(policy(isolation="gvisor", seccomp="/etc/seccomp.json"), BASE)
    assert "seccomp profile" in said
    assert warnings(policy(isolation="gvisor", seccomp="strict"), BASE) == []
