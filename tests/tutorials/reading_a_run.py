"What must hold after the cells of the page reading_a_run, each under the id of its cell."

# ruff: noqa: F403, F405, F821
from fastcore.test import *

# %% eb8b7b86
test_eq(fast.status, 'finished')

# %% 9c268114
test_eq(line, fast.metrics[-1])

# %% 34b52912
assert 'learning_rate' in repr(difference)

# %% 0d4d1736
assert {slow.name, fast.name} <= {r.name for r in runs}
