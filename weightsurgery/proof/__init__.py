"""What an output's record makes possible: to check the output, and to make it again."""
