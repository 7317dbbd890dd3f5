"""Systems that store a model in fewer parameters."""
