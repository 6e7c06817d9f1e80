"""What each distillation method does with a trace, one file a method."""
