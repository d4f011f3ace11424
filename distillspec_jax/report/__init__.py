"""Tables, figures and pages made from the files that runs write."""
