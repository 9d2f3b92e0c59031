"""Files that bulk inference reads: tables, arrays and images."""
