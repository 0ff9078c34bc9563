"""Architectures: tensor names, roles, transforms and metadata. An architecture is one module here."""
