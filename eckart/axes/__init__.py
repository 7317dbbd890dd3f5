"""The axes of a recipe: small frozen values with one or two pure methods each."""

from . import allocate as allocate
from . import factor as factor
from . import filter as filter
from . import form as form
from . import metric as metric
from . import roles as roles
from . import score as score
from . import source as source
from . import target as target
from .protocols import Budget as Budget
from .protocols import Bundle as Bundle
from .protocols import Edits as Edits
from .protocols import Site as Site
from .protocols import Stat as Stat
from .recipe import Recipe as Recipe
