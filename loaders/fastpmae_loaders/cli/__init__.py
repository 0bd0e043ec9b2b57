"""What every command shares: how it begins and ends, what it prints, what it may write over."""
