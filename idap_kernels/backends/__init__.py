"""One module per backend, with the same functions; see ``idap_kernels.dispatch.Backend``."""
