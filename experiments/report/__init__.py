"""From records of runs to tables, plots and pages."""
