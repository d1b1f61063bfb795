"""Looking at a dataset before it is trained on: copies, broken files, odd images, wrong labels."""
