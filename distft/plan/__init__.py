"""What a job needs and how it is divided: pure functions of the job and of detected facts."""
