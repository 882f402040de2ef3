"""Binary layers: their levels and products, the latent form for training and the packed form for inference."""
