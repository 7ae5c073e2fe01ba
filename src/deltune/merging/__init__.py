"""Arithmetic on deltas without a model: merging, and how alike two of them are."""

from deltune.merging.combine import merge as merge
from deltune.merging.compare import diff as diff
from deltune.merging.merged import Merged as Merged
from deltune.merging.recipe import Recipe as Recipe
from deltune.merging.search import greedy_soup as greedy_soup
from deltune.merging.search import search_weights as search_weights
from deltune.merging.statistics import fishers as fishers
from deltune.merging.statistics import grams as grams
