layout! {
    iommufd::iommu_destroy { size id }
    iommufd::iommu_ioas_alloc { size flags out_ioas_id }
    iommufd::iommu_iova_range { start last }
    iommufd::iommu_ioas_iova_ranges { size ioas_id num_iovas __reserved allowed_iovas out_iova_alignment }
    iommufd::iommu_ioas_allow_iovas { size ioas_id num_iovas __reserved allowed_iovas }
    iommufd::iommu_ioas_map { size flags ioas_id __reserved user_va length iova }
    iommufd::iommu_ioas_noiommu_get_pa { size flags ioas_id __reserved iova length out_phys }
    iommufd::iommu_ioas_map_file { size flags ioas_id fd start length iova }
    iommufd::iommu_ioas_copy { size flags dst_ioas_id src_ioas_id length dst_iova src_iova }
    iommufd::iommu_ioas_unmap { size ioas_id iova length }
    iommufd::iommu_option { size option_id op __reserved object_id val64 }
    iommufd::iommu_vfio_ioas { size ioas_id op __reserved }
    iommufd::iommu_hwpt_vtd_s1 { flags pgtbl_addr addr_width __reserved }
    iommufd::iommu_hwpt_arm_smmuv3 { ste }
    iommufd::iommu_hwpt_amd_guest { dte }
    iommufd::iommu_hwpt_alloc { size flags dev_id pt_id out_hwpt_id __reserved data_type data_len data_uptr fault_id __reserved2 }
    iommufd::iommu_hw_info_vtd { flags __reserved cap_reg ecap_reg }
    iommufd::iommu_hw_info_arm_smmuv3 { flags __reserved idr iidr aidr }
    iommufd::iommu_hw_info_tegra241_cmdqv { flags version log2vcmdqs log2vsids __reserved }
    iommufd::iommu_hw_info_amd { efr efr2 }
    iommufd::iommu_hw_info { size flags dev_id data_len data_uptr in_data_type out_max_pasid_log2 __reserved out_capabilities }
    iommufd::iommu_hwpt_set_dirty_tracking { size flags hwpt_id __reserved }
    iommufd::iommu_hwpt_get_dirty_bitmap { size hwpt_id flags __reserved iova length page_size data }
    iommufd::iommu_hwpt_vtd_s1_invalidate { addr npages flags __reserved }
    iommufd::iommu_viommu_arm_smmuv3_invalidate { cmd }
    iommufd::iommu_hwpt_invalidate { size hwpt_id data_uptr data_type entry_len entry_num __reserved }
    iommufd::iommu_hwpt_pgfault { flags dev_id pasid grpid perm __reserved addr length cookie }
    iommufd::iommu_hwpt_page_response { cookie code }
    iommufd::iommu_fault_alloc { size flags out_fault_id out_fault_fd }
    iommufd::iommu_viommu_tegra241_cmdqv { out_vintf_mmap_offset out_vintf_mmap_length }
    iommufd::iommu_viommu_alloc { size flags type_ dev_id hwpt_id out_viommu_id data_len __reserved data_uptr }
    iommufd::iommu_vdevice_alloc { size viommu_id dev_id out_vdevice_id virt_id }
    iommufd::iommu_ioas_change_process { size __reserved }
    iommufd::iommufd_vevent_header { flags sequence }
    iommufd::iommu_vevent_arm_smmuv3 { evt }
    iommufd::iommu_vevent_tegra241_cmdqv { lvcmdq_err_map }
    iommufd::iommu_veventq_alloc { size flags viommu_id type_ veventq_depth out_veventq_id out_veventq_fd __reserved }
    iommufd::iommu_hw_queue_alloc { size flags viommu_id type_ index out_hw_queue_id nesting_parent_iova length }
    vfio::vfio_info_cap_header { id version next }
    vfio::vfio_group_status { argsz flags }
    vfio::vfio_device_info { argsz flags num_regions num_irqs cap_offset pad }
    vfio::vfio_device_info_cap_pci_atomic_comp { header flags reserved }
    vfio::vfio_region_info { argsz flags index cap_offset size offset }
    vfio::vfio_region_sparse_mmap_area { offset size }
    vfio::vfio_region_info_cap_sparse_mmap { header nr_areas reserved areas }
    vfio::vfio_region_info_cap_type { header type_ subtype }
    vfio::vfio_region_gfx_edid { edid_offset edid_max_size edid_size max_xres max_yres link_state }
    vfio::vfio_device_migration_info { device_state reserved pending_bytes data_offset data_size }
    vfio::vfio_region_info_cap_nvlink2_ssatgt { header tgt }
    vfio::vfio_region_info_cap_nvlink2_lnkspd { header link_speed __pad }
    vfio::vfio_irq_info { argsz flags index count }
    vfio::vfio_irq_set { argsz flags index start count data }
    vfio::vfio_pci_dependent_device { group_id segment bus devfn }
    vfio::vfio_pci_hot_reset_info { argsz flags count devices }
    vfio::vfio_pci_hot_reset { argsz flags count group_fds }
    vfio::vfio_device_gfx_plane_info { argsz flags drm_plane_type drm_format drm_format_mod width height stride size x_pos y_pos x_hot y_hot region_index reserved }
    vfio::vfio_device_ioeventfd { argsz flags offset data fd reserved }
    vfio::vfio_device_feature { argsz flags data }
    vfio::vfio_device_bind_iommufd { argsz flags iommufd out_devid token_uuid_ptr }
    vfio::vfio_device_attach_iommufd_pt { argsz flags pt_id pasid }
    vfio::vfio_device_detach_iommufd_pt { argsz flags pasid }
    vfio::vfio_device_feature_migration { flags }
    vfio::vfio_device_feature_mig_state { device_state data_fd }
    vfio::vfio_precopy_info { argsz flags initial_bytes dirty_bytes }
    vfio::vfio_device_low_power_entry_with_wakeup { wakeup_eventfd reserved }
    vfio::vfio_device_feature_dma_logging_control { page_size num_ranges __reserved ranges }
    vfio::vfio_device_feature_dma_logging_range { iova length }
    vfio::vfio_device_feature_dma_logging_report { iova length page_size bitmap }
    vfio::vfio_device_feature_mig_data_size { stop_copy_length }
    vfio::vfio_device_feature_bus_master { op }
    vfio::vfio_region_dma_range { offset length }
    vfio::vfio_device_feature_dma_buf { region_index open_flags flags nr_ranges dma_ranges }
    vfio::vfio_device_feature_zpci_err { data }
    vfio::vfio_iommu_type1_info { argsz flags iova_pgsizes cap_offset pad }
    vfio::vfio_iova_range { start end }
    vfio::vfio_iommu_type1_info_cap_iova_range { header nr_iovas reserved iova_ranges }
    vfio::vfio_iommu_type1_info_cap_migration { header flags pgsize_bitmap max_dirty_bitmap_size }
    vfio::vfio_iommu_type1_info_dma_avail { header avail }
    vfio::vfio_iommu_type1_dma_map { argsz flags vaddr iova size }
    vfio::vfio_bitmap { pgsize size data }
    vfio::vfio_iommu_type1_dma_unmap { argsz flags iova size data }
    vfio::vfio_iommu_type1_dirty_bitmap { argsz flags data }
    vfio::vfio_iommu_type1_dirty_bitmap_get { iova size bitmap }
    vfio::vfio_iommu_spapr_tce_ddw_info { pgsizes max_dynamic_windows_supported levels }
    vfio::vfio_iommu_spapr_tce_info { argsz flags dma32_window_start dma32_window_size ddw }
    vfio::vfio_iommu_spapr_register_memory { argsz flags vaddr size }
    vfio::vfio_iommu_spapr_tce_create { argsz flags page_shift __resv1 window_size levels __resv2 start_addr }
    vfio::vfio_iommu_spapr_tce_remove { argsz flags start_addr }
    iommufd_test::iommu_test_cmd { size op id __reserved last }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_1 { start length }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_2 { out_stdev_id out_hwpt_id out_idev_id }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_3 { out_stdev_id out_hwpt_id out_idev_id dev_flags }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_4 { pt_id }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_5 { iova length uptr }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_6 { length uptr refs }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_7 { out_access_fd flags }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_8 { access_pages_id }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_9 { flags out_access_pages_id iova length uptr }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_10 { iova length uptr flags }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_11 { limit }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_12 { ioas_id }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_13 { flags iova length page_size uptr out_nr_dirty }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_14 { id iotlb }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_15 { dev_id pasid grpid perm addr }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_16 { id cache }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_17 { dev_id }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_18 { pasid pt_id }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_19 { pasid pt_id }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_20 { pasid }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_21 { pasid hwpt_id }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_22 { length open_flags }
    iommufd_test::iommu_test_cmd__bindgen_ty_1__bindgen_ty_23 { dmabuf_fd revoked }
    iommufd_test::iommu_test_hw_info { flags test_reg }
    iommufd_test::iommu_hwpt_selftest { iotlb pagetable_type }
    iommufd_test::iommu_hwpt_invalidate_selftest { flags iotlb_id }
    iommufd_test::iommu_viommu_selftest { in_data out_data out_mmap_offset out_mmap_length }
    iommufd_test::iommu_viommu_invalidate_selftest { flags vdev_id cache_id }
    iommufd_test::iommu_viommu_event_selftest { virt_id }
}
