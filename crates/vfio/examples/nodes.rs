//! Prints the device nodes that this mix of features serves for one device, and what it lacks.
//!
//!     cargo run -p vfio --example nodes --features device-cdev

#[cfg(any(feature = "device-cdev", feature = "group"))]
fn main() -> Result<(), Box<dyn std::error::Error>> {
    use std::sync::Arc;

    use iommufd::soft::SoftDevice;
    use vfio::{
        devices::test,
        doors::{Registration, System, Token},
    };

    let system = System::new(false);
    system.add(Registration {
        name: "0000:00:05.0".into(),
        address: Some((0, 0, 0x28)),
        device: Arc::new(test::function()?),
        hardware: Some(SoftDevice::new(5, Vec::new())),
        reset_set: None,
        token: Token::none(),
        number: None,
    })?;
    for node in system.nodes() {
        println!("{node}");
    }
    if let Some(missing) = system.missing_container() {
        eprintln!("note: {missing}");
    }
    Ok(())
}

#[cfg(not(any(feature = "device-cdev", feature = "group")))]
fn main() {
    eprintln!("note: this was built without doors");
}
