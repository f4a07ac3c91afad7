"""The microVM tier: a kernel of its own for each workload, in a virtual machine in a ring of the linux tier."""
