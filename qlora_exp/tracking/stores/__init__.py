"""What is known of MLflow stores: URIs, files, places of artifacts, views, and which ones this user has used."""
