"""Plans, the runs that they stand for, and what is made of finished runs: tables, charts and pages."""
