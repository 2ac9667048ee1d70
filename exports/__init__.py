"""What training ends in and everything else takes: an export, its forms, its files and its card."""
