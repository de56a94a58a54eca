"""Small MLPs after attention and after the MLP of every layer, before these are added to the residual stream."""
