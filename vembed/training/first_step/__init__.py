"""What the first optimizer step shows: a table, a file, and warnings that name a setting.

Most runs that come to nothing are visible in their first batch: a loss at chance, texts that are
their own negatives, a temperature that hides every difference. Later steps are not looked at.
"""

from vembed.training.first_step.advice import advise
from vembed.training.first_step.report import FILE_NAME, FirstStepReport
from vembed.training.first_step.watch import FirstStepWatch

__all__ = ["FILE_NAME", "FirstStepReport", "FirstStepWatch", "advise"]
