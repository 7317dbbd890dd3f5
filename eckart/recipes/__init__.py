"""One short file per published system. Nothing here is imported before it is asked for by name: see `eckart.registry`."""
