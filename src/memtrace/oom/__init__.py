"""The report that is written when memory runs out: who held it, and what would have helped."""
