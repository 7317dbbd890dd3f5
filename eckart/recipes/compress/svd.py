"""Plain truncated SVD: nearest in Frobenius norm, blind to the data. The baseline of every other system."""

from eckart.axes import Recipe

RECIPE = Recipe(
    name="svd",
    verb="compress",
    paper="doi:10.1007/BF02288367",
    title="Eckart-Young truncation of the weights",
    roles={},
)
