"""What happened?"""

from . import attempts, comparing, run  # noqa: F401  (the first two add methods to Run and RunList)
