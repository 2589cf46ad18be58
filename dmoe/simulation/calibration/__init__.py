"""`dmoe plan --calibrate`: measure the machine at hand and write a cluster file of tables."""
