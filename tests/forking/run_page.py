"`python -m run_page NOTEBOOK FLAGS FORCE ROOT`: one page from top to bottom; flags are words with commas between them"

import sys
from nbdev.test import test_nb


def words(text):
    return text.split(',') if text else []


if __name__ == '__main__':
    nb, skip, force, root = sys.argv[1:]
    passed, seconds = test_nb(nb, skip_flags=words(skip), force_flags=words(force), basepath=root, cell_timing_min=5)
    sys.exit(not passed)
