"What must hold after the cells of the page export_and_serve, each under the id of its cell."

# ruff: noqa: F403, F405, F821
from fastcore.test import *

# %% a66e5d35
assert right >= 12

# %% 7cd22a7b
test_eq(streamed, served[0])
assert abs(after - right) <= 2
