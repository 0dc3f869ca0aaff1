"What must hold after the cells of the page fit_and_speed, each under the id of its cell."

# ruff: noqa: F403, F405, F821
from fastcore.test import *

# %% c36a9454
assert plan.fits

# %% 5726bca3
test_eq((plan.load_in_4bit, small.load_in_4bit), (False, True))

# %% 1741e374
test_eq(big.fits, False)

# %% f6d76bb9
assert speeds['classic'] * 3 < speeds['plan'] < speeds['fastest']
