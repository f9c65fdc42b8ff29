"""The dataset doctor: findings in annotations, images and their fit to a detector."""
