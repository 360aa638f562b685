"""What people do with a pruned network: scripts for a folder of images and a checkpoint file of one's own."""
