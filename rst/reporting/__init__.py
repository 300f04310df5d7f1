"""From the records of finished runs to statistics, tables, figures and claims."""
