"""Units, scores, budgets and plans; knows neither experts nor channels."""
