"""Guest kernels: where they are kept, and how they are built, fetched or brought by a user."""
