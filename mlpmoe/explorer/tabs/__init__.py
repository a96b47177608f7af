"""The tabs, a panel and its handlers each."""
