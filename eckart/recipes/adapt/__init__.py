"""Systems that fine-tune a model through a small trained branch at each layer."""
