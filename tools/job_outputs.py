"""Copy the outputs of a finished run into its job notebook, so that the notebook's page shows a real run.

    python tools/job_outputs.py RUN [RUN …]        a run's name, directory or 'latest'

Only a run with default parameters fits: what the page shows must be what the page's parameters give."""

import sys

import nbformat

from unsloth_nb.runs.run import open_run
from unsloth_nb.core.spec import jobs_dir


def copy_outputs(ref):
    "Outputs cell by cell; refuse a run whose notebook is another one"
    run = open_run(ref)
    if run.status != 'finished':
        sys.exit(f'{run.name} is {run.status}, not finished')
    page = jobs_dir() / f'{run.kind}.ipynb'
    nb = nbformat.read(page, as_version=4)
    ran = nbformat.read(run.path / 'notebook.ipynb', as_version=4)
    if [c.source for c in nb.cells] != [c.source for c in ran.cells]:
        sys.exit(f'{run.name} was made by another version of {page.name}, or with other parameters')
    for to, c in zip(nb.cells, ran.cells):
        if c.cell_type == 'code':
            to.outputs = c.outputs
            to.execution_count = None
    nbformat.write(nb, page)
    print(f'{page.name}: outputs of {run.name}')


if __name__ == '__main__':
    for ref in sys.argv[1:]:
        copy_outputs(ref)
