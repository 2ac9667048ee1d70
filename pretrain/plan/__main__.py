"""`python -m pretrain.plan` prints the tables of docs/performance.md."""

from __future__ import annotations

from pretrain.plan.roofline import roofline_table
from pretrain.plan.tables import documented_tables

if __name__ == "__main__":
    print("\n\n".join([*documented_tables(), roofline_table()]))
