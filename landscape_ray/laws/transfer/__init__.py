"""Laws that carry a loss over: to other training data, to tests, to the accuracy on a task."""
