pub fn launch() {}
