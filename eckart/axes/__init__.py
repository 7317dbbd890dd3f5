"""The axes of a recipe: small frozen values with one or two pure methods each."""

from . import allocate as allocate
from . import core as core
from . import factor as factor
from . import filter as filter
from . import form as form
from . import gradient as gradient
from . import group as group
from . import loss as loss
from . import metric as metric
from . import penalty as penalty
from . import recover as recover
from . import refine as refine
from . import refresh as refresh
from . import roles as roles
from . import score as score
from . import source as source
from . import target as target
from . import variance as variance
from .protocols import Budget as Budget
from .protocols import Bundle as Bundle
from .protocols import Edits as Edits
from .protocols import Site as Site
from .protocols import Stat as Stat
from .recipe import Recipe as Recipe
