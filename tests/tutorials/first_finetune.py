"What must hold after the cells of the page first_finetune, each under the id of its cell."

# ruff: noqa: F403, F405, F821
from fastcore.test import *

# %% 6ad8b132
assert tok.decode([i for i, m in zip(example.input_ids, example.mask) if m]).endswith(tok.eos_token)

# %% 6dcc0955
test_eq(result.metrics['base']['exact_match'], 0)
assert result.metrics['tuned']['exact_match'] > 0.5

# %% 4eb23f20
assert (kept.path / 'adapter/adapter_model.safetensors').exists()
