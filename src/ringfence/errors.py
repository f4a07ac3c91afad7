"""The one family of errors that users see: what failed, which value, what to do next, and a stable code."""


class RingfenceError(Exception):
    """An expected failure, shown as one line without a traceback.

    `code` is stable (``RF-...``) and documented in docs/errors.md; `exit_status` is what the CLI exits with.
    """

    code = "RF-ERROR"
    exit_status = 125

    def __init__(self, message: str, *, hint: str = "") -> None:
        """Say what failed and with which value in `message`, and what to do next in `hint`."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        hint = f"; {self.hint}" if self.hint else ""
        return f"{one_line(self.message)}{one_line(hint)} [{self.code}]"


class UsageError(RingfenceError):
    """The command line makes no sense; nothing was tried."""

    code = "RF-USAGE"
    exit_status = 2


class PolicyError(RingfenceError):
    """A policy cannot be read or contradicts itself."""

    code = "RF-POLICY"


class HostError(RingfenceError):
    """This host lacks something that the plan needs."""

    code = "RF-HOST"


class NotEnforceable(HostError):
    """A field of the policy cannot be enforced here; `fields` are the dotted names, for --allow-unenforced."""

    code = "RF-UNENFORCEABLE"

    def __init__(self, message: str, *, fields: tuple[str, ...], hint: str = "") -> None:
        """Refuse, and name the policy `fields` that nothing here enforces."""
        super().__init__(message, hint=hint)
        self.fields = fields


class ImageError(RingfenceError):
    """An image cannot be found, read or used."""

    code = "RF-IMAGE"


class MountError(RingfenceError):
    """A mount of the policy is dangerous or impossible."""

    code = "RF-MOUNT"


class SandboxError(RingfenceError):
    """The sandbox could not be started or driven."""

    code = "RF-SANDBOX"


class ProofError(SandboxError):
    """An asked control was not observed; the job was not started."""

    code = "RF-PROOF"


def one_line(text: str) -> str:
    """Return `text` with control characters made visible, so that hostile names cannot forge lines or colours."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
