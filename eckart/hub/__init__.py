"""Plugs into the libraries that users already have.

Nothing is imported here, so that `import eckart` stays light; take what you need from its module:
`hub.load` (open a folder), `hub.attach` (make a model saveable, or dense again),
`hub.identify` (what a folder is), `hub.post_import` (tell transformers about eckart).
"""
