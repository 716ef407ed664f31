"""Laws of loss curves that remember every update: multi-power, functional scaling, convex bound."""
