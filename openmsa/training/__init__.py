"""Training: phases and recipes as data, a trainer, sealed checkpoints, text and retrieval data."""

from openmsa.training.data import DataConfig, Mixture, read_documents, standard_library_text
from openmsa.training.phases import Phase, Recipe, recipe_from_dict
from openmsa.training.recipes import RECIPES, dense_twin, fitted
from openmsa.training.run import history, train

__all__ = [
    "RECIPES",
    "DataConfig",
    "Mixture",
    "Phase",
    "Recipe",
    "dense_twin",
    "fitted",
    "history",
    "read_documents",
    "recipe_from_dict",
    "standard_library_text",
    "train",
]
