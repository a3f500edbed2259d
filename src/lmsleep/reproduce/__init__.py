"""The paper's figures and our own as recipes: grids of runs with one figure, table and data file each."""

from lmsleep.reproduce.recipe import Cell, Recipe, Scale
from lmsleep.reproduce.recipes import RECIPES

__all__ = ["RECIPES", "Cell", "Recipe", "Scale"]
