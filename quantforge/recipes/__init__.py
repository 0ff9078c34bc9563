"""Recipes: which tensor gets which type."""

from .recipe import AS_STORED, Choice, Recipe, Rule, get, names, read, rule

__all__ = ["AS_STORED", "Choice", "Recipe", "Rule", "get", "names", "read", "rule"]
