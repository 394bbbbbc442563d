"""The journal and MLflow. The only package that imports mlflow."""
