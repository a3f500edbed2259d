"""Experiments as data: settings, the paper's figures and our own as recipes, their results, and the demo."""

from lmsleep.recipes.catalogue import GROUPS, RECIPES
from lmsleep.recipes.recipe import Cell, Recipe
from lmsleep.recipes.settings import Scale

__all__ = ["GROUPS", "RECIPES", "Cell", "Recipe", "Scale"]
