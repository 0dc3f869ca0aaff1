"What must hold after the cells of the page scale_out, each under the id of its cell."

# ruff: noqa: F403, F405, F821
from fastcore.test import *

# %% 537964e9
assert len(traces[0]) == len(traces[1]) == job.max_steps and max(abs(a - b) for a, b in zip(*traces)) < 1e-5

# %% 99d260f4
with expect_fail(RankLost, 'rank 1 of 2 was killed by SIGKILL'):
    finetune(model, data, hurt.job, run=hurt)

# %% 3fdc534f
assert max(abs(m['loss'] - x) for m, x in zip(hurt.metrics, traces[1])) < 1e-5

# %% a57622d3
test_eq({t.state for t in found.trials}, {'finished'})

# %% cd8fedd2
test_eq(request.kind, 'finetune')
