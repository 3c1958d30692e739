"""What people see: tables on a terminal, plain text in a pipe."""
